package etcdctl

import (
	"fmt"
	"strings"
	"testing"
)

const (
	// contextLines are shown around a difference.
	contextLines = 3
	// lineBytes is how much is shown of one line.
	lineBytes = 2000
)

// difference shows the lines only in a with "-", those only in b with "+", and some of those around; it is empty if there are none.
func difference(a, b string) string {
	if a == b {
		return ""
	}
	lines := align(strings.Split(a, "\n"), strings.Split(b, "\n"))
	near := make([]bool, len(lines))
	for i, line := range lines {
		if line[0] != ' ' {
			for j := max(0, i-contextLines); j < min(len(lines), i+contextLines+1); j++ {
				near[j] = true
			}
		}
	}
	var shown strings.Builder
	for i, line := range lines {
		switch {
		case near[i] && len(line) > lineBytes:
			fmt.Fprintf(&shown, "  %s… (%d bytes)\n", line[:lineBytes], len(line))
		case near[i]:
			fmt.Fprintf(&shown, "  %s\n", line)
		case i == 0 || near[i-1]:
			shown.WriteString("  …\n")
		}
	}
	return shown.String()
}

// align keeps a longest common subsequence of lines, marked by a space.
func align(a, b []string) []string {
	// common[i][j] is the length of the longest common subsequence of a[i:] and b[j:].
	common := make([][]int, len(a)+1)
	for i := range common {
		common[i] = make([]int, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var lines []string
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			lines = append(lines, " "+a[i])
			i, j = i+1, j+1
		case j == len(b) || i < len(a) && common[i+1][j] >= common[i][j+1]:
			lines = append(lines, "-"+a[i])
			i++
		default:
			lines = append(lines, "+"+b[j])
			j++
		}
	}
	return lines
}

func TestDifference(t *testing.T) {
	if got := difference("same\n", "same\n"); got != "" {
		t.Errorf("of equal texts: %q", got)
	}
	got := difference("1\n2\n3\n4\n5\nold\n6\n7", "1\n2\n3\n4\n5\nnew\n6\n7\nmore")
	want := "  …\n   3\n   4\n   5\n  -old\n  +new\n   6\n   7\n  +more\n"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
