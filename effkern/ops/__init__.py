"""Drop-in torch ops, one folder each (api, schema, reference, triton)."""
