package field

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"trainerd/secloop/scenario"
)

// filter is blue's nftables ruleset: one table with chains that accept, for
// what comes in, for the limits on open connections of what came past those, and
// for what goes out, to which refusals are added: a refused packet is answered
// with a reset, so that nobody waits for what will not come. Rules are built from typed
// values over netlink; no rule text exists.
type filter struct {
	conn   *nftables.Conn
	table  *nftables.Table
	chains [chains]*nftables.Chain
	count  [chains]int                // rules of each
	refuse map[string]*nftables.Chain // by tool: where its rules send what they refuse
	logs   bool                       // whether refused packets are logged
	sets   int
}

// Chains. The kernel forgets a connection that has ended at its next tick only,
// so limits count none that another rule refuses.
const (
	chainIn = iota
	chainLimits
	chainOut
	chains
)

func newFilter(logs bool) (*filter, error) {
	conn, err := nftables.New(nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	f := &filter{conn: conn, refuse: map[string]*nftables.Chain{}, logs: logs}
	f.table = conn.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "secloop"})
	accept := nftables.ChainPolicyAccept
	for i, c := range [chains]nftables.Chain{
		chainIn:     {Name: "in", Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter},
		chainLimits: {Name: "limits", Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityRef(*nftables.ChainPriorityFilter + 1)},
		chainOut:    {Name: "out", Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter},
	} {
		c.Table, c.Type, c.Policy = f.table, nftables.ChainTypeFilter, &accept
		f.chains[i] = conn.AddChain(&c)
		// Resets always pass: they carry the filter's own answers.
		conn.AddRule(&nftables.Rule{Table: f.table, Chain: f.chains[i], Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offsetFlags, Len: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{flagRST}, Xor: []byte{0}},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0}},
			&expr.Verdict{Kind: expr.VerdictAccept},
		}})
		f.count[i]++
	}
	if err := conn.Flush(); err != nil {
		return nil, fmt.Errorf("make table: %w", err)
	}
	return f, nil
}

// Offsets in the IPv4 and TCP headers.
const (
	offsetSource      = 12
	offsetDestination = 16
	offsetPort        = 2
	offsetFlags       = 13
)

// refusal is the chain of a tool: it logs, with the tool as prefix, then answers
// with a reset. Each /24 of sources has a limit of its own, so that a flood drowns
// neither the reader nor the others whom the rule meets.
func (f *filter) refusal(tool string) (*nftables.Chain, error) {
	if f.refuse[tool] != nil {
		return f.refuse[tool], nil
	}
	c := f.conn.AddChain(&nftables.Chain{Name: "refuse_" + tool, Table: f.table})
	if f.logs {
		set := &nftables.Set{Table: f.table, Name: "logged_" + tool, KeyType: nftables.TypeIPAddr, Dynamic: true, Size: logNetworks}
		if err := f.conn.AddSet(set, nil); err != nil {
			return nil, fmt.Errorf("add set: %w", err)
		}
		f.conn.AddRule(&nftables.Rule{Table: f.table, Chain: c, Exprs: []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offsetSource, Len: 4},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: []byte{255, 255, 255, 0}, Xor: make([]byte, 4)},
			&expr.Dynset{SrcRegKey: 1, SetName: set.Name, SetID: set.ID, Operation: unix.NFT_DYNSET_OP_UPDATE,
				Exprs: []expr.Any{&expr.Limit{Type: expr.LimitTypePkts, Rate: logRate, Unit: expr.LimitTimeSecond, Burst: logBurst}}},
			&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_PREFIX | 1<<unix.NFTA_LOG_SNAPLEN | 1<<unix.NFTA_LOG_QTHRESHOLD,
				Group: logGroup, Snaplen: logCopy, QThreshold: 1, Data: []byte(tool)},
		}})
	}
	f.conn.AddRule(&nftables.Rule{Table: f.table, Chain: c, Exprs: []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}})
	f.refuse[tool] = c
	return c, nil
}

// add appends a tool's rule and reads the chain back.
func (f *filter) add(r scenario.Rule, tool string) error {
	which := chainIn
	switch {
	case r.PerSource > 0:
		which = chainLimits
	case r.Out:
		which = chainOut
	}
	chain := f.chains[which]
	var x []expr.Any
	equal := func(base expr.PayloadBase, offset uint32, value []byte) {
		x = append(x, &expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: uint32(len(value))},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value})
	}
	if r.Src.IsValid() {
		a := r.Src.As4()
		equal(expr.PayloadBaseNetworkHeader, offsetSource, a[:])
	}
	if r.Dst.IsValid() {
		a := r.Dst.As4()
		equal(expr.PayloadBaseNetworkHeader, offsetDestination, a[:])
	}
	if r.Port != 0 {
		x = append(x, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}})
		equal(expr.PayloadBaseTransportHeader, offsetPort, binaryutil.BigEndian.PutUint16(r.Port))
	}
	if !r.Established {
		x = append(x, &expr.Ct{Key: expr.CtKeySTATE, Register: 1},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitNEW), Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)})
	}
	if r.PerHour > 0 {
		x = append(x, &expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(r.PerHour), Unit: expr.LimitTimeHour, Burst: uint32(r.PerHour), Over: true})
	}
	if r.PerSource > 0 {
		f.sets++
		set := &nftables.Set{Table: f.table, Name: fmt.Sprintf("sources%d", f.sets), KeyType: nftables.TypeIPAddr, Dynamic: true, Size: 4096}
		if err := f.conn.AddSet(set, nil); err != nil {
			return fmt.Errorf("add set: %w", err)
		}
		// Nor do they count what nobody listens for, which ends at once too:
		// without a socket the rule ends at its first expression.
		x = append(x, &expr.Socket{Key: expr.SocketKeyTransparent, Register: 1},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offsetSource, Len: 4},
			&expr.Dynset{SrcRegKey: 1, SetName: set.Name, SetID: set.ID, Operation: unix.NFT_DYNSET_OP_ADD,
				Exprs: []expr.Any{&expr.Connlimit{Count: uint32(r.PerSource), Flags: expr.NFT_CONNLIMIT_F_INV}}})
	}
	refusal, err := f.refusal(tool)
	if err != nil {
		return err
	}
	x = append(x, &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictGoto, Chain: refusal.Name})
	f.conn.AddRule(&nftables.Rule{Table: f.table, Chain: chain, Exprs: x})
	if err := f.conn.Flush(); err != nil {
		return fmt.Errorf("add rule: %w", err)
	}
	f.count[which]++
	rules, err := f.conn.GetRules(f.table, chain)
	if err != nil {
		return fmt.Errorf("read rules back: %w", err)
	}
	if len(rules) != f.count[which] {
		return fmt.Errorf("read rules back: %d in chain %s, expected %d", len(rules), chain.Name, f.count[which])
	}
	return nil
}

// refused is how many packets the rules have turned away, by their counters.
func (f *filter) refused() (uint64, error) {
	var n uint64
	for _, chain := range f.chains {
		rules, err := f.conn.GetRules(f.table, chain)
		if err != nil {
			return 0, fmt.Errorf("read counters: %w", err)
		}
		for _, r := range rules {
			for _, x := range r.Exprs {
				if c, ok := x.(*expr.Counter); ok {
					n += c.Packets
				}
			}
		}
	}
	return n, nil
}
