"""What the commands are built of; nothing here imports the commands."""
