"""Tables, plots and progress."""
