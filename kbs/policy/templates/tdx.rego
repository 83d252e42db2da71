# Resource policy for TDX guests, with or without GPUs. Nothing is allowed unless a rule says so.
#
# input: claims of the guest's token, made anew for each request from verified facts.
# data:  {"plugin": "resource", "resource-path": [repository, type, tag], "query": {}}
package policy

import rego.v1

default allow := false

cpu := input.submods.cpu0

evidence := cpu["ear.veraison.annotated-evidence"]

allow if {
	data.plugin == "resource"
	cpu["ear.status"] == "affirming"
	evidence.tdx.td_attributes.debug == false
	evidence.tdx.tcb_status == "UpToDate"

	# A guest that nobody can log in to.
	evidence.cai.guest.profile == "sealed"

	# Whatever else is there must be affirming too.
	every submod in input.submods {
		submod["ear.status"] == "affirming"
	}
}
