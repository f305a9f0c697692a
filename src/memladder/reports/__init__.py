"""What is shown: figures, tables, and the explanation of one record."""
