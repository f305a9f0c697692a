"""How commands are typed, and what they print."""
