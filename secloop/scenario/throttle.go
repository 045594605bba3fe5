package scenario

import (
	"net/netip"
	"time"
)

// Shape limits what a blue host sends to the outside, where the attackers are:
// what exceeds the burst waits at the blue gateway, in order, and leaves at the
// rate. Packets of SmallPacket bytes and more have one queue; those below it, such
// as handshakes, acknowledgements and single lines of text, have another one with
// the same rate and burst, so that connections come about while volume waits.
// Users are on another link and are not limited. Of two shapes of one host the
// lower rate holds.
type Shape struct {
	Src   netip.Addr `json:"src"`
	Rate  int        `json:"rate"`  // bits per second
	Burst int        `json:"burst"` // bytes that leave at once, headers included
}

// Verdicts about a throttled transfer must not depend on how busy a machine is.
// After t seconds a throttled host has sent at most
//
//	2 · (burst + packet + rate/8 · t)
//
// bytes: 2 queues, and a packet may leave as long as anything of the burst is
// left. With the fastest rate of throttle_upload, 32 kbit/s:
//
//   - A stage that does not transfer volume makes a host send less than the
//     bursts, so nothing that it waits for is delayed. (The most is 12 KB, by a real
//     sshd that is guessed at six times.)
//   - Who waits for volume gives up after Patience in which less than the stage's
//     "least" came. Of a throttled transfer at most 2 · (16384 + 1514 + 4000) =
//     43796 bytes come in the first second, and 49152 are wanted: it is given up
//     after that second. A transfer of full packets, which is what red's is, uses one
//     queue: 21898 bytes; a second would have to last 7.8 to bring 49152.
//   - Nobody waits longer than MostPatience: 2 · (16384 + 1514 + 40000) = 115796
//     bytes, by one queue 57898, which is less than the 131072 that such a stage
//     asks for. However far Patience is stretched, a throttled transfer does not succeed.
//
// A transfer that is not throttled takes milliseconds. It fails only when
// 49152 bytes do not come within Patience, which stretches with the load: it is
// counted in ticks, and a tick whose end is noticed late begins the next one
// late. The sender thus has ten turns of the processor for each of the
// receiver's, and at least a second.
//
// TestThrottleLeavesAMargin does these sums over catalogue and tools.
const (
	UploadBurst  = 16 << 10
	SmallPacket  = 256  // bytes with the IP header; a power of 2, so that a mask tells
	LargestFrame = 1514 // bytes of a packet with its Ethernet header
	PatienceTick = 100 * time.Millisecond
	Patience     = 10 // ticks
	MostPatience = 10 * time.Second
)

// Throttled is the kind of the events that say what a Shape held back.
const Throttled = "throttled"

// Outside reports whether an address is beyond the gateway where shapes apply.
func Outside(a netip.Addr) bool {
	return Space.Contains(a) && !HostNet.Contains(a) && !UserNet.Contains(a)
}
