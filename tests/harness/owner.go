package harness

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"time"
)

// owner finds the member that opened a connection. All of them dial from the same address, so the kernel is asked: its
// table of connections gives the socket behind the other end, and the process that holds this socket is the member's.
// That takes no privileges, and nothing that the members would have to know.
func (n *network) owner(conn *net.TCPConn) *Member {
	// The table is read in pieces while it changes, so a row may be missed, on a busy machine more than once.
	for range 10 {
		if m := n.ownerNow(conn); m != nil {
			return m
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil
}

func (n *network) ownerNow(conn *net.TCPConn) *Member {
	n.processes.RLock()
	defer n.processes.RUnlock()
	inode := socket(conn)
	if inode == "" {
		return nil
	}
	n.mu.Lock()
	members := slices.Collect(maps.Keys(n.members))
	n.mu.Unlock()
	for _, m := range members {
		if holds(m.pid.Load(), inode) {
			return m
		}
	}
	return nil
}

// socket is the inode of the other end of a connection on this machine.
func socket(conn *net.TCPConn) string {
	table, err := os.Open("/proc/self/net/tcp")
	if err != nil {
		return ""
	}
	defer table.Close()
	// The other end's local address is our remote one.
	local, remote := row(conn.RemoteAddr()), row(conn.LocalAddr())
	for lines := bufio.NewScanner(table); lines.Scan(); {
		if !bytes.Contains(lines.Bytes(), []byte(local)) {
			continue
		}
		// sl local_address rem_address st queues timer retransmits uid timeout inode
		fields := strings.Fields(lines.Text())
		if len(fields) > 9 && fields[1] == local && fields[2] == remote {
			return fields[9]
		}
	}
	return ""
}

// row is an address as the kernel's table has it: the four bytes as a number of this machine, then the port.
func row(address net.Addr) string {
	tcp := address.(*net.TCPAddr)
	return fmt.Sprintf("%08X:%04X", binary.NativeEndian.Uint32(tcp.IP.To4()), tcp.Port)
}

// holds says whether a process has this socket open.
func holds(pid int64, inode string) bool {
	if pid == 0 {
		return false
	}
	directory := fmt.Sprintf("/proc/%d/fd", pid)
	files, err := os.ReadDir(directory)
	if err != nil {
		return false
	}
	for _, file := range files {
		if target, err := os.Readlink(directory + "/" + file.Name()); err == nil && target == "socket:["+inode+"]" {
			return true
		}
	}
	return false
}
