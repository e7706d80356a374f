"""The terminal: `python -m llama …`, its commands, and how they read and speak."""
