"""Options: what they are, where they are read from, and the command line that every script shares."""
