"""Where records come from: files of every kind."""
