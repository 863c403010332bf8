"""Tools that change a model through the ledger."""
