"""What the commands at the root are built of. Imports nothing of the root."""
