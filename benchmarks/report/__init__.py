"""Write the tables and pictures of the documents from the CSV files in `benchmarks/results`."""
