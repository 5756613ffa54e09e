// Package apiserver runs two unmodified kube-apiservers on two tenants of one tenured.
//
// They are built from the Kubernetes release named in go.mod and started with default flags, apart from what tells two of
// them on one machine apart and a compaction interval short enough to watch. Run through make, see the package harness.
package apiserver
