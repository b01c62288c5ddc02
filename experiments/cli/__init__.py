"""What all commands share: the command line, help, the terminal, settings of the C library."""
