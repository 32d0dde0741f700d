"""What every room stands on: the backend, checks, plots, tables, linear algebra."""
