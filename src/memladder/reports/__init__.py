"""What is shown: the figure, the tables, and the published values that they are held against."""
