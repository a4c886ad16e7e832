"""What a person sees of a job, without a request and without SQL."""
