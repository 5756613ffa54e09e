package harness

import (
	"path/filepath"
	"testing"
)

// Built returns the path of a program of this workspace: they are all where tenured is.
func Built(t testing.TB, name string) string {
	t.Helper()
	return existing(t, filepath.Join(filepath.Dir(tenuredPath(t)), name))
}
