"""The steps of the chain, as the command line and the Dagster assets run them."""
