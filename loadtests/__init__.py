"""What is sent: workload, arrivals, prompts, Locust, and the record of every request."""
