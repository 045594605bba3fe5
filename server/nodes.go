package server

import (
	"net/http"

	"github.com/labstack/echo/v4"
	"github.com/prometheus/client_golang/prometheus"

	"trainerd/internal/fault"
	"trainerd/trainer"
)

type nodeReport struct {
	Step    *int64 `json:"step"` // -1: serves nothing yet
	Digest  string `json:"digest"`
	State   string `json:"state"`
	Message string `json:"message"`
	TTL     string `json:"ttl"` // how long the report is good for; "" is 1m
}

type nodeList struct {
	PolicyStep int64          `json:"policy_step"` // of the newest checkpoint, -1 before the first
	Nodes      []trainer.Node `json:"nodes"`
}

// reportNode takes what an inference node says it serves. Reports replace one another.
func (s *Server) reportNode(c echo.Context) error {
	job, err := s.job(c)
	if err != nil {
		return err
	}
	var in nodeReport
	if err := s.decodeJSON(c, &in); err != nil {
		return err
	}
	if in.Step == nil {
		return fault.BadField("step", "nothing", "the step that the node serves, -1 for none")
	}
	d, err := ttl(in.TTL, trainer.DefaultNodeTTL)
	if err != nil {
		return err
	}
	err = job.ReportNode(c.Param("node"), trainer.NodeReport{Step: *in.Step, Digest: in.Digest, State: in.State, Message: in.Message, TTL: d})
	if err != nil {
		return err
	}
	return c.NoContent(http.StatusNoContent)
}

func (s *Server) listNodes(c echo.Context) error {
	job, err := s.job(c)
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, nodeList{PolicyStep: job.Status().PolicyStep, Nodes: job.Nodes()})
}

var (
	descNodes    = prometheus.NewDesc("trainerd_nodes", "Inference nodes by what they last said; silent ones apart.", []string{"job", "state"}, nil)
	descLagSteps = prometheus.NewDesc("trainerd_node_lag_steps", "Steps that a node's policy is behind the newest checkpoint.", []string{"job", "node"}, nil)
	descLagSecs  = prometheus.NewDesc("trainerd_node_lag_seconds", "Time since the first checkpoint that a node does not serve yet.", []string{"job", "node"}, nil)
)

// nodeCollector reads the nodes of all jobs at each scrape. Silent nodes have no
// lag: what they serve is not known.
type nodeCollector struct{ manager *trainer.Manager }

// Describe implements prometheus.Collector.
func (*nodeCollector) Describe(out chan<- *prometheus.Desc) {
	out <- descNodes
	out <- descLagSteps
	out <- descLagSecs
}

// Collect implements prometheus.Collector.
func (c *nodeCollector) Collect(out chan<- prometheus.Metric) {
	for _, j := range c.manager.Jobs() {
		nodes := j.Nodes()
		if len(nodes) == 0 {
			continue
		}
		count := map[string]int{"silent": 0}
		for _, state := range trainer.NodeStates {
			count[state] = 0
		}
		for _, n := range nodes {
			if n.Silent {
				count["silent"]++
				continue
			}
			count[n.State]++
			out <- prometheus.MustNewConstMetric(descLagSteps, prometheus.GaugeValue, float64(n.LagSteps), string(j.ID), n.Name)
			out <- prometheus.MustNewConstMetric(descLagSecs, prometheus.GaugeValue, n.LagSecs, string(j.ID), n.Name)
		}
		for state, n := range count {
			out <- prometheus.MustNewConstMetric(descNodes, prometheus.GaugeValue, float64(n), string(j.ID), state)
		}
	}
}
