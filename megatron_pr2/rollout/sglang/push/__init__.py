"""The trainer's weights on their way into servers: through process groups, or through a directory."""
