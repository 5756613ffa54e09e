package etcdctl

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// mask replaces what two right servers answer differently by a name for it.
type mask struct {
	pattern *regexp.Regexp
	with    string
}

// hide makes a mask. $1 and so on in its replacement are what the pattern's groups matched, and stay.
func hide(pattern, with string) mask { return mask{regexp.MustCompile(pattern), with} }

var (
	address       = hide(`(http://)?127\.0\.0\.1:\d+`, "ADDRESS")
	jsonHeader    = hide(`"cluster_id":"?[0-9a-f]+"?,"member_id":"?[0-9a-f]+"?(,"revision":\d+)?,"raft_term":\d+`, `"cluster_id":ID,"member_id":ID$1,"raft_term":TERM`)
	fieldsHeader  = hide(`"ClusterID" : [0-9a-f]+\n"MemberID" : [0-9a-f]+\n("Revision" : \d+\n)?"RaftTerm" : \d+\n`, "\"ClusterID\" : ID\n\"MemberID\" : ID\n$1\"RaftTerm\" : TERM\n")
	protobufIDs   = hide(`\b(cluster_id|member_id|raft_term|ID|memberID): \d+`, "$1: ID")
	logTime       = hide(`"ts":"[^"]+"`, `"ts":"TIME"`)
	clientPointer = hide(`etcd-endpoints://0x[0-9a-f]+`, "etcd-endpoints://POINTER")
)

// masks of every scenario.
var masks = []mask{address, jsonHeader, fieldsHeader, protobufIDs, logTime, clientPointer}

func (s *session) masked(text string) string {
	for i, lease := range s.leases {
		name := fmt.Sprintf("LEASE%d", i+1)
		text = strings.ReplaceAll(text, lease, name)
		if number, err := strconv.ParseInt(lease, 16, 64); err == nil {
			text = strings.ReplaceAll(text, strconv.FormatInt(number, 10), name)
		}
	}
	for _, masks := range [][]mask{masks, s.scenario.masks} {
		for _, mask := range masks {
			text = mask.pattern.ReplaceAllString(text, mask.with)
		}
	}
	return text
}

// grantedLease finds the id in what "lease grant" prints, in each of its formats.
var grantedLease = regexp.MustCompile(`lease ([0-9a-f]{16}) granted|"ID" ?: ?(\d+)`)

func (s *session) learnLease(output string) {
	granted := grantedLease.FindStringSubmatch(output)
	switch {
	case granted == nil:
	case granted[1] != "":
		s.leases = append(s.leases, granted[1])
	default:
		if number, err := strconv.ParseInt(granted[2], 10, 64); err == nil {
			s.leases = append(s.leases, fmt.Sprintf("%016x", number))
		}
	}
}
