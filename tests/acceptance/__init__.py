"""What perdure does, seen from outside: the public interface only."""
