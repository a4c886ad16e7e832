"""What the tests are built on: a real Milepost, stand-ins of other services, databases, a browser."""
