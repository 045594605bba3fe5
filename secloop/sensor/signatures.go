package sensor

import (
	"net/netip"
	"regexp"
	"slices"
)

// Where the bytes of a signature come from.
type side int

const (
	client side = iota
	server
)

// Signature is one row of the table. A signature with a pattern is searched in
// the first bytes of one direction of a connection; the others count.
type Signature struct {
	ID       int
	Name     string
	Category string
	Severity int // 1 high, 2 medium, 3 low

	ports   []uint16 // of the server; nil for any
	by      side
	pattern *regexp.Regexp
	outside bool // only where the client is neither a blue host nor trusted
	egress  bool // only where a blue host is the client and somebody outside the server
	inside  bool // only between blue hosts: the client is the alert's target, the server its source
	every   int  // raised at each so many matches; 0 means at the first
}

var webPorts = []uint16{80, 8009}

const (
	reconnaissance = "attempted-recon"
	webAttack      = "web-application-attack"
	access         = "attempted-user"
	policy         = "policy-violation"
	trojan         = "trojan-activity"
	denial         = "attempted-dos"
	tampering      = "protocol-command-decode"
)

// The table. Patterns run on bytes with the URL escapes of the first line undone.
var (
	portScan       = Signature{ID: 1001, Name: "Port scan", Category: reconnaissance, Severity: 3, every: 4}
	synFlood       = Signature{ID: 1002, Name: "Many half-open connections", Category: denial, Severity: 1, every: 128}
	manyOpen       = Signature{ID: 1003, Name: "Many connections from one source", Category: denial, Severity: 2, every: 12}
	failedLogins   = Signature{ID: 1004, Name: "Repeated failed logins", Category: access, Severity: 2, ports: []uint16{22, 445}, by: server, pattern: regexp.MustCompile(`(?m)^denied`), every: 3}
	largeOutbound  = Signature{ID: 1005, Name: "Large outbound transfer", Category: trojan, Severity: 1, egress: true}
	refusedByRule  = Signature{ID: 1007, Name: "Packet refused by rule", Category: policy, Severity: 3} // its alerts have the rule's tool as category
	outboundServer = Signature{ID: 1006, Name: "Server opened an outbound connection", Category: policy, Severity: 2, egress: true}
)

const largeTransfer = 32 << 10 // bytes out of one connection

var patterns = []Signature{
	{ID: 2001, Name: "Administrative command to data store", Category: tampering, Severity: 1, ports: []uint16{6379},
		pattern: regexp.MustCompile(`(?im)^(config set|module load|slaveof|save|eval)\b`)},
	{ID: 2002, Name: "Bulk read from data store", Category: policy, Severity: 2, ports: []uint16{6379}, pattern: regexp.MustCompile(`(?im)^(keys \*|scan 0|dump |get records)`)},
	{ID: 2003, Name: "Internal header in request from outside", Category: webAttack, Severity: 1, ports: webPorts, outside: true,
		pattern: regexp.MustCompile(`(?i)\r\nx-middleware-subrequest:`)},
	{ID: 2004, Name: "Object or lookup expression in request", Category: webAttack, Severity: 1, ports: webPorts, pattern: regexp.MustCompile(`"@type":|\$\{[a-z:-]*jndi`)},
	{ID: 2005, Name: "Executable content in upload", Category: webAttack, Severity: 1, ports: webPorts,
		pattern: regexp.MustCompile(`(?is)^(put|post) /(upload|files).*(<%|<\?|serialized:)`)},
	{ID: 2006, Name: "Shell command in request", Category: webAttack, Severity: 1, ports: webPorts, pattern: regexp.MustCompile(`(?i)[?&=:"](cat|sh|bash) /[a-z]+`)},
	{ID: 2007, Name: "Active content in comment", Category: webAttack, Severity: 2, ports: webPorts, pattern: regexp.MustCompile(`(?is)^post /comments.*<(script|form|img[^>]*onerror)`)},
	{ID: 2008, Name: "Form that acts on an account", Category: webAttack, Severity: 2, ports: webPorts, pattern: regexp.MustCompile(`(?is)<form[^>]*action=./?account|(?-s)^get /account/reset`)},
	{ID: 2009, Name: "SQL syntax in query", Category: webAttack, Severity: 2, ports: webPorts, pattern: regexp.MustCompile(`(?i)^get [^\r]*'[^\r]*\b(or|union)\b`)},
	{ID: 2010, Name: "Path traversal or file outside the web root", Category: webAttack, Severity: 2, ports: webPorts, pattern: regexp.MustCompile(`(?i)^get [^\r]*(\.\./|/@fs/|=/etc/)`)},
	{ID: 2011, Name: "Stream wrapper in request", Category: webAttack, Severity: 1, ports: webPorts, pattern: regexp.MustCompile(`(?i)(php://|convert\.iconv|expect://)`)},
	{ID: 2012, Name: "URL in request parameter", Category: webAttack, Severity: 2, ports: webPorts, pattern: regexp.MustCompile(`(?i)^get [^\r]*=https?://`)},
	{ID: 2013, Name: "Internal address in request parameter", Category: webAttack, Severity: 1, ports: webPorts, pattern: regexp.MustCompile(`(?i)^get [^\r]*=https?://(127\.|localhost|169\.254\.)`)},
	{ID: 2014, Name: "Remote file in include parameter", Category: webAttack, Severity: 1, ports: webPorts, pattern: regexp.MustCompile(`(?i)^get /page[^\r]*=https?://`)},
	{ID: 2015, Name: "Partial upload of a session file", Category: webAttack, Severity: 1, ports: webPorts, pattern: regexp.MustCompile(`(?is)^put .*\r\ncontent-range:`)},
	{ID: 2016, Name: "File argument in management command", Category: webAttack, Severity: 1, ports: []uint16{8009}, pattern: regexp.MustCompile(`(?is)^post /cli.*@/`)},
	{ID: 2017, Name: "Access to management port from outside", Category: policy, Severity: 3, ports: []uint16{8009}, outside: true, pattern: regexp.MustCompile(`(?s)^.`)},
	{ID: 2018, Name: "Session used outside the office", Category: access, Severity: 2, ports: webPorts, outside: true, pattern: regexp.MustCompile(`(?i)\r\ncookie: session=`)},
	{ID: 2019, Name: "Account file in response", Category: webAttack, Severity: 1, ports: webPorts, by: server, pattern: regexp.MustCompile(`root:x:0:0`)},
	{ID: 2020, Name: "Bulk read from file share", Category: policy, Severity: 2, ports: []uint16{445}, pattern: regexp.MustCompile(`(?m)^RUN (archive|get|list) `)},
	{ID: 2021, Name: "Program copied to file share", Category: trojan, Severity: 1, ports: []uint16{445}, pattern: regexp.MustCompile(`(?m)^RUN put `)},
	{ID: 2022, Name: "Command channel beacon", Category: trojan, Severity: 1, egress: true, pattern: regexp.MustCompile(`^hello\b`)},
	{ID: 2023, Name: "Scheduled program checks in", Category: trojan, Severity: 1, egress: true, pattern: regexp.MustCompile(`^job [0-9]+ ready`)},
	{ID: 2024, Name: "Session cookie sent outside", Category: trojan, Severity: 1, egress: true, pattern: regexp.MustCompile(`^cookie=`)},
	{ID: 2025, Name: "Dynamic update of a DNS zone", Category: tampering, Severity: 1, ports: []uint16{53}, pattern: regexp.MustCompile(`(?s)^....[\x28-\x2f]`)}, // opcode 5 after length and id
	{ID: 2026, Name: "Long label in DNS query", Category: trojan, Severity: 2, ports: []uint16{53}, inside: true, pattern: regexp.MustCompile(`[0-9a-f]{24,}`)},
	{ID: 2027, Name: "DNS query for a newly seen domain", Category: trojan, Severity: 2, ports: []uint16{53}, inside: true, pattern: regexp.MustCompile(`(?s)^.{12,}(cdn|stat|img|sync).{0,12}(pool|edge|cache)`)},
	{ID: 2028, Name: "Unfinished request", Category: denial, Severity: 3, ports: webPorts, every: 12, pattern: regexp.MustCompile(`(?is)\r\nx-wait:`)},
}

// Signatures lists the table.
func Signatures() []Signature {
	return append([]Signature{portScan, synFlood, manyOpen, failedLogins, largeOutbound, outboundServer, refusedByRule}, patterns...)
}

// began looks at a connection's first packet.
func (e *Engine) began(k flowKey, t *tries) {
	ours := e.net.Host(k.server.Addr()) != ""
	if ours && e.net.Host(k.client.Addr()) == "" && len(t.ports) >= portScan.every && t.count%portScan.every == 0 {
		e.raise(&portScan, k)
	}
	if e.egress(k) {
		e.raise(&outboundServer, k)
	}
}

func (e *Engine) egress(k flowKey) bool {
	return e.net.Host(k.client.Addr()) != "" && e.net.Host(k.server.Addr()) == "" && !k.server.Addr().IsLoopback()
}

// half looks at the number of connections from one source network that were begun and not completed.
func (e *Engine) half(k flowKey, n int) {
	if n%synFlood.every == 0 {
		near := k
		near.client = netip.AddrPortFrom(network(k.client.Addr()), 0)
		e.raise(&synFlood, near)
	}
}

// connected looks at the number of connections that one address made to another.
func (e *Engine) connected(k flowKey, n int) {
	if n%manyOpen.every == 0 && e.net.Host(k.server.Addr()) != "" {
		e.raise(&manyOpen, k)
	}
}

// search looks for patterns in what one side has said so far.
func (e *Engine) search(k flowKey, f *flow, by int) {
	ours := e.net.Host(k.server.Addr()) != ""
	fromOurs := e.net.Host(k.client.Addr()) != ""
	if by == 0 && e.egress(k) && f.total[0] >= largeTransfer && f.fired[largeOutbound.ID] == 0 {
		f.fired[largeOutbound.ID] = 1
		e.raise(&largeOutbound, k)
	}
	text := ""
	for i := range searched {
		s := searched[i]
		switch {
		case int(s.by) != by, s.ports != nil && !slices.Contains(s.ports, k.server.Port()):
			continue
		case s.egress != e.egress(k), s.inside != (ours && fromOurs), !s.egress && !ours:
			continue
		case s.outside && (fromOurs || e.net.Trusted(k.client.Addr())):
			continue
		case s.every == 0 && f.fired[s.ID] > 0:
			continue
		}
		if text == "" {
			text = decoded(f.said[by])
		}
		n := len(s.pattern.FindAllStringIndex(text, 64))
		for ; f.fired[s.ID] < n; f.fired[s.ID]++ {
			if s.every == 0 {
				e.raise(s, k)
				f.fired[s.ID] = n
				break
			}
			e.count(s, k)
		}
	}
}

var searched = func() []*Signature {
	all := []*Signature{&failedLogins}
	for i := range patterns {
		all = append(all, &patterns[i])
	}
	return all
}()
