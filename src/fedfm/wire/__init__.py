"""What crosses between organisations: who sent it, who alone can read it, whether it is new, and how it travels."""
