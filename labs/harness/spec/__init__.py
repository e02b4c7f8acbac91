"""What a lab is: its workloads, variants, points and claims, its page, and the theory beside it."""
