"""Small guests made of Python: each drives one kind of device through the rings of a front end."""
