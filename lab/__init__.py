"""What the commands at the root are built of. Of the root it imports model alone, in weights."""
