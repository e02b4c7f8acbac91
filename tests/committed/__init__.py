"""What holds of the runs that git keeps and of the pages made of them, in a real browser too."""
