"""What the command line is made of: state and streams, options, arguments, progress, views."""
