"""The host memory behind a zone: what backs it, what it costs, and how it is given back."""
