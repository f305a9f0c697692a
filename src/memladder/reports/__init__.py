"""Pages for people: figures, tables, and the explanation of one record."""
