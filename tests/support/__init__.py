"""What tests stand on, by what it stands for. Imported by its full name."""
