"""One self-contained page of records: drawn, explained, compared, and asked what fits."""
