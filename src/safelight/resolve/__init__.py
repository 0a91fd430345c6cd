"""From a request to a job: every name becomes content, once. No torch."""
