"""How weights lie and multiply."""
