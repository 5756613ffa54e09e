// Package apiserver runs unmodified kube-apiservers on tenants of tenured: two on two tenants of one member, and two that
// share a tenant of three members.
//
// They are built from the Kubernetes release named in go.mod and started with default flags, apart from what tells two of
// them on one machine apart and a compaction interval short enough to watch. Run through make, see the package harness.
package apiserver
