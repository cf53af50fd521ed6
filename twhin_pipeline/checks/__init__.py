"""What must hold between two steps, in DuckDB SQL, one file a check."""
