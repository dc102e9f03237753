"""What this machine has of what backends need; imports nothing that may be missing."""
