"""Where embedding tables live, and how they are looked up and updated."""
