package apiserver

import (
	"strconv"
	"strings"
)

// sumOf adds up the samples of a metric in Prometheus' text format whose labels contain the given text.
func sumOf(metrics, name, label string) float64 {
	sum := 0.0
	for line := range strings.Lines(metrics) {
		labels, isName := strings.CutPrefix(line, name)
		if !isName || !strings.ContainsAny(labels[:1], "{ ") || !strings.Contains(labels, label) {
			continue
		}
		if value, err := strconv.ParseFloat(strings.TrimSpace(line[strings.LastIndexByte(line, ' '):]), 64); err == nil {
			sum += value
		}
	}
	return sum
}
