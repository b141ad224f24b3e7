"""What pages of results share: their frame and style, tables, figures, numbers in words."""
