"""The linears that an adapter sits on."""
