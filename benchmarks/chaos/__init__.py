"""A consortium whose coordinator, broker and members are killed while it runs."""
