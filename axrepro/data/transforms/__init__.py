"""What is made of records: text, tokens, pictures and sound."""
