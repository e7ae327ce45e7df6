"""What Locust runs: the user that measures, who arrives when, what is asked, what is kept of each request."""
