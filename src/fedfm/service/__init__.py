"""The two sides of a consortium at work: the coordinator, which runs what is submitted, and a member, which answers with its own data."""
