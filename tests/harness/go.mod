module tenure.dev/tests/harness

go 1.26.0
