"""What each command of the server's command line does. All are imported at start: only light imports at the top."""
